from posjax.encodings import CoPE
from posjax.models import TransformerConfig
from posjax.tasks import FlipFlop
from posjax.training import Config, OptimizerConfig, TrainConfig


def flip_flop() -> Config:
    """Remember the last bit written, with rare and with frequent writes (CPU, minutes).

    What it shows: a read attends to the most recent write, however long ago that was. In the split
    "sparse" writes are far rarer than in training. Seeds differ much on this task: compare several,
    and look at "in_distribution" beside "sparse", which can look good for a model that has not
    learned the task.

    Command: python train.py flip_flop --compare cope cope.capped rope --seeds 0 1 2 3 4

    Result and time: wrong reads on sparse strings, seeds 0 to 4: CoPE 3.1 % (one seed fails),
    with all gates 1 1.5 %, RoPE 11.3 %; see docs/results. About 20 minutes on 2 cores.
    """
    return Config(
        name="flip_flop",
        task=FlipFlop(length=128, examples=4096),
        model=TransformerConfig(layers=2, heads=2, width=32),
        encoding=CoPE(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        train=TrainConfig(steps=1500, batch_size=16, log_every=20, evaluation_batch_size=128),
    )
