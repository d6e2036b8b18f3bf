"""psycopg's pool and its users in the rows of faults.rs, which starts this.

Arguments: conninfo, users, size, timeout, pause and stagger (seconds), query, and "check" or "-". What it says and is told is
described at `Program::start` in faults/users.rs.
"""

import logging
import os
import sys
import threading
import time

from psycopg_pool import ConnectionPool

conninfo, users, size, timeout, pause, stagger, query, check = sys.argv[1:9]
users, size, timeout, pause, stagger = int(users), int(size), float(timeout), float(pause), float(stagger)

# The pool's warnings about connects that fail are not what is measured.
logging.disable(logging.CRITICAL)
pool = ConnectionPool(
    conninfo,
    min_size=size,
    max_size=size,
    timeout=timeout,
    open=True,
    check=ConnectionPool.check_connection if check == "check" else None,
    # Statements are not prepared behind the back of a pooler; the other pools' queries are not, either.
    kwargs={"autocommit": True, "prepare_threshold": None},
)
pool.wait()

stopped = threading.Event()
output = threading.Lock()


def say(line):
    with output:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def call():
    """What went wrong, as `faults.rs` wants to be told."""
    stage = "checkout"
    try:
        with pool.connection() as conn:
            stage = "query"
            conn.execute(query)
        return "ok"
    except Exception as e:
        return f"{stage} {type(e).__name__}: {' '.join(str(e).split())}"


def use(user):
    if stopped.wait(stagger * user):
        return
    while True:
        say(f"begun {user} {time.monotonic()}")
        went = call()
        say(f"ended {user} {time.monotonic()} {went}")
        if stopped.wait(pause):
            return


print("ready", flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "go":
        say(f"now {time.monotonic()}")
        for user in range(users):
            threading.Thread(target=use, args=(user,), daemon=True).start()
    elif word == "stop":
        stopped.set()
    elif word == "close":
        # It may take as long as its workers are busy.
        threading.Thread(target=pool.close, daemon=True).start()
# Whatever the pool's threads are doing.
os._exit(0)
