"""Two processes with a group between them, which run what tests ask of them."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

SIZE = 2
LIMIT = 60.0
"""Seconds after which a call is taken for one whose ranks wait for each other."""


class Ranks:
    """Call a function in every process; it gives what each returned, or raises what one raised."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(SIZE)]
        self.ends = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self.ends:
            end.send_bytes(pickle.dumps((function, args)))
        replies = []
        for rank, end in enumerate(self.ends):
            if not end.poll(LIMIT):
                self.close()
                raise TimeoutError(f"rank {rank} of {function.__name__} waits for another")
            replies.append(pickle.loads(end.recv_bytes()))
        for failed, result in replies:
            assert not failed, result
        return [result for _, result in replies]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, store: str, end: Any) -> None:
    torch.set_num_threads(1)
    group = torch.distributed.FileStore(store, SIZE)
    torch.distributed.init_process_group("gloo", store=group, rank=rank, world_size=SIZE)
    while True:
        function, args = pickle.loads(end.recv_bytes())
        torch.manual_seed(0)
        try:
            reply = False, function(*args)
        except Exception:
            reply = True, traceback.format_exc()
        end.send_bytes(pickle.dumps(reply))
