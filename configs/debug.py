from posjax.encodings import CoPE
from posjax.models import TransformerConfig
from posjax.tasks import SelectiveCopy
from posjax.training import Config, OptimizerConfig, TrainConfig


def debug() -> Config:
    """Everything once, in seconds: a tiny model for a few steps, to see that an installation works.

    What it shows: nothing but that training, evaluation, checkpoints, report and figures work.

    Command: python train.py debug

    Result and time: some seconds on a CPU; the model has learned nothing yet.
    """
    return Config(
        name="debug",
        task=SelectiveCopy(
            symbols=4, alphabet=4, blanks=4, dense_blanks=2, sparse_blanks=8, examples=32
        ),
        model=TransformerConfig(layers=1, heads=2, width=16),
        encoding=CoPE(num_positions=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        train=TrainConfig(
            steps=20, batch_size=8, log_every=5, checkpoint_every=10, evaluation_batch_size=16
        ),
    )
