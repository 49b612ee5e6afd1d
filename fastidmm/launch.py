"""Several ranks on this machine, by torch's own launcher."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from fastidmm.errors import Gone, Interrupted
from fastidmm.facts import num_cores

HERE = "127.0.0.1"


def launch(num: int, words: Sequence[str]) -> int:
    """Do `fastidmm WORDS` by so many processes, and wait for all; the exit status."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the ranks say themselves what happened
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",
        local_addr=HERE,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastidmm", *words)
    except SignalException:
        return Interrupted.status
    except ChildFailedError as problem:
        rank, failure = problem.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        raise Gone(
            f"rank {rank} was ended by {failure.signal_name()}; `fastidmm resume` goes on from the "
            "last checkpoint."
        ) from None
    return 0
