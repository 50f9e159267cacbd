#include <stdio.h>

/* greet prints who is there; the Go program runs it as a child. */
int main(int argc, char **argv) {
	printf("hello, %s\n", argc > 1 ? argv[1] : "nobody");
	return 0;
}
