"""A Python that has imported the heavy packages: each script runs in a fork of it, as __main__.

Importing torch and transformers costs more than most of the commands in the READMEs do.

    python tests/warm_python.py SOCKET                           the server; SIGTERM ends it
    python -S tests/warm_python.py SOCKET SCRIPT ARGUMENTS...    run a script; its exit status
"""

import json
import os
import socket
import sys


def serve(path):
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    while True:
        connection, _ = server.accept()
        message, descriptors, _, _ = socket.recv_fds(connection, 1_000_000, 3)
        child = os.fork()
        if child == 0:
            run(descriptors, **json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(status).encode())
        connection.close()


def run(descriptors, argv, directory, environment):
    """Be a fresh process that was started as `python argv...`; never return."""
    import runpy
    import traceback

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))  # noqa: PTH100, PTH120
    status = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ask(path, argv):
    """Have the server run a script with this process's directory, environment, input and output."""
    message = {"argv": argv, "directory": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
        return int(connection.recv(100) or b"1")


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
