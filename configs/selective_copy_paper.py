from posjax.encodings import CoPE
from posjax.models import TransformerConfig
from posjax.tasks import SelectiveCopy
from posjax.training import Config, OptimizerConfig, TrainConfig


def selective_copy_paper() -> Config:
    """Selective copy at the size of the CoPE paper: 256 blanks, 128 and 512 in evaluation (GPU).

    What it shows: section 5.2 of arXiv:2405.18719. The numbers of blanks are the paper's. Published
    are neither the number of symbols and the alphabet (kept from the CPU preset here) nor learning
    rate, schedule and batch: those here are usual values for a model of this size (4 layers, width
    256, 4 heads, 10,000 steps, as for flip-flop).

    Command: python train.py selective_copy_paper

    Result and time: not measured yet.
    """
    return Config(
        name="selective_copy_paper",
        task=SelectiveCopy(blanks=256, dense_blanks=128, sparse_blanks=512),
        model=TransformerConfig(layers=4, heads=4, width=256),
        encoding=CoPE.paper(),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="linear", final_fraction=0.0, warmup_steps=100,
            b2=0.999, weight_decay=0.1,
        ),
        train=TrainConfig(steps=10_000, batch_size=64),
    )  # fmt: skip
