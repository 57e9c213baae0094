"""
torchrun, which says in one line what its page says when a process fails, and ends as a shell expects.

run     python -m plumbing.launch --standalone --nproc_per_node=2 -- base_train.py --resume=1
"""
import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

logging.disable(logging.ERROR)

try:
    main()
except SignalException as error:
    sys.exit(128 + error.sigval)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    print(f"rank {rank} ended with code {code}, so the others were ended as well", file=sys.stderr)
    sys.exit(code)
except Exception as error:                       # a machine that never joins, a port that is taken
    reason = str(error).strip() or repr(error)
    print(f"the processes did not come together: {reason.splitlines()[0]:.200}", file=sys.stderr)
    sys.exit(1)
