"""The process that ends what a killed supervisor has left: it reads process ids until its input closes."""

from __future__ import annotations

import selectors
import signal
import sys

from flows.sandbox.process_tree import ProcessTree

#: Seconds between two looks: a process started and orphaned within one of them is found by its session.
_LOOK = 1.0


def watch() -> None:
    """Know the trees of all processes named on stdin, one id a line; end them when stdin closes.

    After an orderly stop nothing of them is left and this does nothing.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    trees: list[ProcessTree] = []
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            if selector.select(_LOOK):
                line = sys.stdin.readline()
                if not line:
                    break
                trees.append(ProcessTree(int(line)))
            trees = [tree for tree in trees if tree.look().tasks]
    for tree in trees:
        tree.end()


if __name__ == "__main__":
    watch()
