package kernel

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Allowed names the system calls that a box may make whatever the arguments.
// It is what builds, servers and language runtimes use. Left out on purpose,
// beside the administration of the machine: namespaces and mounts (unshare,
// setns, mount, the fsopen and open_tree families, pivot_root, chroot), bpf,
// perf_event_open, key rings, io_uring, userfaultfd, ptrace and the other ways
// into a process (process_vm_*, process_madvise, pidfd_getfd, kcmp), file
// handles, clocks, fanotify, modify_ldt, and NUMA placement.
func Allowed() []string {
	return strings.Fields(`
access faccessat faccessat2 alarm arch_prctl brk cachestat capget capset chdir fchdir
chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown
clock_getres clock_gettime clock_nanosleep close close_range connect bind listen accept accept4
copy_file_range creat dup dup2 dup3
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
eventfd eventfd2 execve execveat exit exit_group fadvise64 fallocate fcntl
fdatasync fsync sync syncfs sync_file_range flock fork vfork
stat fstat lstat newfstatat statx statfs fstatfs ftruncate truncate
futex futex_wait futex_waitv futex_wake futex_requeue futimesat utime utimes utimensat
getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresuid getrlimit get_robust_list getrusage getsid
getsockname getsockopt get_thread_area gettid gettimeofday getuid
getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr
setxattr lsetxattr fsetxattr getxattrat setxattrat listxattrat removexattrat
inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioprio_get ioprio_set
kill tkill tgkill landlock_add_rule landlock_create_ruleset landlock_restrict_self
link linkat symlink symlinkat readlink readlinkat unlink unlinkat rename renameat renameat2
lseek madvise membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat
mlock mlock2 mlockall munlock munlockall mmap mprotect mremap mseal msync munmap map_shadow_stack
mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
msgctl msgget msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget
nanosleep open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2
pkey_alloc pkey_free pkey_mprotect poll ppoll pselect6 select prctl prlimit64
pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv write writev
recvfrom recvmmsg recvmsg sendfile sendmmsg sendmsg sendto restart_syscall rseq
rmdir rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam
sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid
setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address setuid
shutdown sigaltstack signalfd signalfd4 splice tee vmsplice sysinfo
time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
timerfd_create timerfd_gettime timerfd_settime times umask uname wait4 waitid
`)
}

// A Rule decides a call by the lower half of one of its arguments: the kernel
// looks at no more of those that have rules.
type Rule struct {
	Name   string
	Arg    int        // which argument decides
	Mask   uint32     // the bits of it that count; 0 is all
	Values []uint32   // these are allowed and the others are not,
	Except bool       // or the other way round
	Errno  unix.Errno // what is not allowed gets
	Inner  *Inner     // one more value, for which another argument decides
}

// An Inner allows a value of the argument of its Rule if another argument has
// one value, and else not.
type Inner struct {
	Value    uint32 // of the argument of the Rule
	Arg      int
	Required uint32 // of that argument
}

// newNamespaces are the flags of clone(2) that make a namespace. CLONE_NEWTIME
// is not among them: clone reads its bit as part of the exit signal.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Rules are the calls that a box may make with some arguments only. None of
// them is among Allowed.
func Rules() []Rule {
	return []Rule{
		{Name: "clone", Mask: newNamespaces, Values: []uint32{0}, Errno: unix.EPERM},
		// Its flags are in memory, which a filter cannot read; libraries fall
		// back to clone.
		{Name: "clone3", Errno: unix.ENOSYS},
		{
			Name: "socket", Values: []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}, Errno: unix.EAFNOSUPPORT,
			Inner: &Inner{Value: unix.AF_NETLINK, Arg: 2, Required: unix.NETLINK_ROUTE},
		},
		{Name: "socketpair", Values: []uint32{unix.AF_UNIX}, Errno: unix.EAFNOSUPPORT},
		// TIOCSTI and TIOCLINUX type into a terminal; TIOCSETD loads line
		// disciplines.
		{Name: "ioctl", Arg: 1, Values: []uint32{unix.TIOCSTI, unix.TIOCLINUX, unix.TIOCSETD}, Except: true, Errno: unix.EPERM},
		// PER_LINUX, PER_LINUX32, each with UNAME26, and the question.
		{Name: "personality", Values: []uint32{0, 0x8, 0x20000, 0x20008, 0xffffffff}, Errno: unix.EPERM},
	}
}
