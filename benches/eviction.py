"""psycopg's pool in the scenarios of eviction.rs, which starts this.

Arguments: conninfo, scenario (silence, trickle or steady), size, max_idle and max_lifetime in seconds (0: the default).
Says "ready" when the pool stands, does its part when told "go", and ends when its input does.
"""

import os
import sys
import threading
import time

from psycopg_pool import ConnectionPool

conninfo, scenario, size, max_idle, max_lifetime = sys.argv[1:6]
size = int(size)
limits = {}
if float(max_idle):
    limits["max_idle"] = float(max_idle)
if float(max_lifetime):
    limits["max_lifetime"] = float(max_lifetime)

pool = ConnectionPool(conninfo, min_size=0, max_size=size, open=True, kwargs={"autocommit": True}, **limits)


def use(conn):
    conn.execute("SELECT 1")


def burst():
    everybody = threading.Barrier(size)

    def worker():
        with pool.connection() as conn:
            use(conn)
            everybody.wait()

    workers = [threading.Thread(target=worker) for _ in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def repeat(pause):
    while True:
        with pool.connection() as conn:
            use(conn)
        time.sleep(pause)


print("ready", flush=True)
sys.stdin.readline()
if scenario == "steady":
    for _ in range(4):
        threading.Thread(target=repeat, args=(0.005,), daemon=True).start()
else:
    burst()
    if scenario == "trickle":
        threading.Thread(target=repeat, args=(0.1,), daemon=True).start()
sys.stdin.readline()
# Whatever the pool's threads are doing.
os._exit(0)
