"""Teach a checkpoint to draft on a folder of text: python examples/convert_and_train.py CHECKPOINT TEXT OUT

A few steps, to show the parts; `tidar/recipes.py` has real runs.
"""

import sys

import tidar
from tidar.convert import convert
from tidar.data.config import DataConfig
from tidar.train.config import TrainConfig
from tidar.train.trainer import train

source, text, out = sys.argv[1:]
convert(source, f"{out}/converted")
config = TrainConfig(
    model=f"{out}/converted",
    data=DataConfig(sources=(text,)),
    out=f"{out}/run",
    tokens=8 * 1024,
    batch_tokens=1024,
    micro_batch=4,
    seq_len=256,
    block_sizes=(4, 8),
    eval_tokens=1024,
    lr=1e-3,
)
result = train(config)

model = tidar.load(result.model)
[answer] = model.generate("import ", tidar.SamplingParams(max_new_tokens=32))
print(f"{answer.text!r}: {answer.tokens_per_forward:.2f} tokens a forward")
