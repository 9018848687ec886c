from posjax.encodings import CoPE
from posjax.models import TransformerConfig
from posjax.tasks import FlipFlop
from posjax.training import Config, OptimizerConfig, TrainConfig


def flip_flop_paper() -> Config:
    """Flip-flop at the size of the CoPE paper: 4 layers, width 256, 10,000 steps, 512 tokens (GPU).

    What it shows: section 5.1 of arXiv:2405.18719, which gives the sizes and the steps, but neither
    batch, learning rate nor schedule. Those here are from the benchmark's own baseline,
    re-implemented by others (arXiv:2306.00946, Appendix B.2): batch 16, AdamW (0.9, 0.999), 3e-4,
    weight decay 0.1, 50 steps of warm-up, then linearly to 0.

    Command: python train.py flip_flop_paper

    Result and time: not measured yet.
    """
    return Config(
        name="flip_flop_paper",
        task=FlipFlop(length=512, examples=4096),
        model=TransformerConfig(layers=4, heads=4, width=256),
        encoding=CoPE.paper(),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="linear", final_fraction=0.0, warmup_steps=50,
            b2=0.999, weight_decay=0.1,
        ),
        train=TrainConfig(steps=10_000, batch_size=16),
    )  # fmt: skip
