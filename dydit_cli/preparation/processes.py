"""Sharing shards among processes, and hearing of each that is done."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from dydit_cli.devices import find_device
from dydit_cli.errors import DyditError
from dydit_cli.pipelines.autoencoder import open_autoencoder
from dydit_cli.preparation.shards import EncodingJob, PlannedShard

Progress = Callable[[int], None]
Failure = tuple[str, str, str]


def encode_shards(
    job: EncodingJob, shards: Sequence[PlannedShard], processes: int, on_progress: Progress
) -> None:
    """Encode all shards, in this process or in several.

    Args:
        job: What encoding needs.
        shards: What to encode.
        processes: How many; 1 stays in this one.
        on_progress: Told how many pictures were encoded more.

    Raises:
        DyditError: what reading a picture raised, also in another process; shards that are done stay.
    """
    if processes == 1 or len(shards) < 2:
        autoencoder = open_autoencoder(job.vae, find_device(job.device))
        for shard in shards:
            job.write(shard, autoencoder)
            on_progress(len(shard.pictures))
        return
    workers = min(processes, len(shards))
    # Spawned: a forked process that has used CUDA or threads cannot go on.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        sizes = {pool.submit(_encode_one, job, shard, threads): len(shard.pictures) for shard in shards}
        for done in as_completed(sizes):
            failure = done.result()
            if failure is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                what, why, fix = failure
                raise DyditError(what, why=why, fix=fix)
            on_progress(sizes[done])


def _encode_one(job: EncodingJob, shard: PlannedShard, threads: int) -> Failure | None:
    """In a process of the pool; a `DyditError` of three parts does not travel by itself."""
    import torch

    torch.set_num_threads(threads)
    try:
        job.run([shard])
    except DyditError as error:
        return error.what, error.why, error.fix
    return None
