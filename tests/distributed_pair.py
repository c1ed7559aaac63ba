"""Two processes that run the checks of `distributed_cases` together, without a port."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD = 2
TIME_LIMIT = 120  # seconds, of one check
COLLECTIVE_LIMIT = 60  # seconds that a rank waits for the other


def serve(rank: int, folder: str, device: str, requests: Connection) -> None:
    """Runs what the parent asks for until it closes the pipe, or is gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import distributed_cases

    while True:
        try:
            name, turn = requests.recv()
        except (EOFError, OSError):
            os._exit(0)  # at once: torch takes seconds to take itself down
        try:
            distributed_cases.run(name, rank, Path(folder) / str(turn), device)
            answer = ""
        except BaseException:
            answer = traceback.format_exc()
        requests.send(answer)


class Pair:
    """The processes and the pipes to them; `close` ends both, whatever they are doing."""

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._turn = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self._folder.name, device, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, name: str) -> list[str]:
        """What went wrong on each rank, in order; empty texts where nothing did."""
        self._turn += 1
        for pipe in self._pipes:
            pipe.send((name, self._turn))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIME_LIMIT):
                self.close()
                answers.append(f"rank {rank} has not answered within {TIME_LIMIT} s")
                break
            answers.append(pipe.recv())
        return answers

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
