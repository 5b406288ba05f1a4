"""Builds an index until it is killed: `python -m tests.indexing.killed SOURCE FOLDER POINT N [WORKERS]` kills itself
with SIGKILL at the N-th call of a function, named POINT, of a build, and prints the ids of the
processes that it leaves behind.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys

from tests.tiny import grounded
from visual_ground.indexing import build, parts

OPTIONS = build.BuildOptions(batch_size=2, part_size=4, thumbnail_size=4, progress=False)


def main(source, folder, point, number, workers=0):
    module = build if hasattr(build, point) else parts
    original, calls = getattr(module, point), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == int(number):
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, point, call)
    build.build_index(
        grounded("llama_untied").eval(), source, folder, dataclasses.replace(OPTIONS, workers=int(workers))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
