# Prints "ID STATUS SECONDS" whenever a job of Gitea's database changes its
# status (models/actions/status.go in code.gitea.io/gitea). The API has whole
# seconds only.
import sqlite3
import sys
import time

db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
seen, version = {}, None
while True:
    now = db.execute("pragma data_version").fetchone()[0]
    if now != version:
        version, at = now, time.time()
        for job, status in db.execute("select id, status from action_run_job order by id desc limit 100").fetchall():
            if seen.get(job) != status:
                seen[job] = status
                print(job, status, f"{at:.6f}", flush=True)
    time.sleep(0.002)
