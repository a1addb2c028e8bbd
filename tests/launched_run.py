"""What accelerate launches in the tests of several processes.

python launched_run.py START OUT RECIPE CHANGES OPTIONS
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny_runs import options_in, small

from ms_resampler.training.recipes import Adapters, LearningRates
from ms_resampler.training.run import train

honest_init = PartialState.__init__


def init(self, *args, **kwargs):
    """accelerate shards (and says it does not, nowhere) only where it finds accelerators: it is told of some."""
    honest_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState.__init__ = init
start, out, recipe = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
changes, options = map(json.loads, sys.argv[4:])
if "adapters" in changes:
    changes["adapters"] = Adapters(**changes["adapters"])
if "rates" in changes:
    changes["rates"] = LearningRates(**changes["rates"])
torch.set_num_threads(1)
train(small(recipe, **changes), **options_in(start, out, device_batch=2, **options))
