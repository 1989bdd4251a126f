"""A process that has imported everything and forks children on request; see `processes.py`, which starts it.

A request is one line of JSON: {"call": [module, function, arguments], "paths": [...], "output": prefix, "env": [one
mapping for each child]} is answered with the children's ids, {"poll": id} with the exit status, or null while it runs.
"""

import atexit
import importlib
import json
import os
import sys
import traceback

import datasets  # noqa: F401
import peft  # noqa: F401
import trl  # noqa: F401

import sapo_trl.cli.train
import sapo_trl.report.build  # noqa: F401


def child(request: dict, i: int) -> int:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['output']}.{i}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"][i])
    sys.path[:0] = request["paths"]
    module, function, arguments = request["call"]
    try:
        return getattr(importlib.import_module(module), function)(*arguments) or 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def start(request: dict) -> list[int]:
    pids = []
    for i in range(len(request["env"])):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            code = child(request, i)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    return pids


def poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    for line in sys.stdin:
        request = json.loads(line)
        answer = poll(request["poll"]) if "poll" in request else start(request)
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
