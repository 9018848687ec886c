from posjax.encodings import CoPE
from posjax.models import TransformerConfig
from posjax.tasks import Text
from posjax.training import Config, OptimizerConfig, TrainConfig


def text_paper() -> Config:
    """Language modelling at the size of the CoPE paper: 12 layers, width 768 (GPU, TPU).

    What it shows: the model of section 5.4 of arXiv:2405.18719, on bytes instead of words, so
    perplexities are not comparable with the paper's. With the 50,257 tokens of GPT-2 the model has
    the paper's 123.7 million parameters. Batch and learning rate are usual values for this size,
    not the paper's.

    Command: python train.py text_paper --data.path FOLDER

    Result and time: not measured yet.
    """
    return Config(
        name="text_paper",
        task=Text(length=1024, validation_bytes=2_000_000),
        model=TransformerConfig(
            layers=12, heads=12, width=768, dtype="bfloat16", tied_embeddings=True,
        ),
        encoding=CoPE.paper(),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000, weight_decay=0.1, b2=0.95),
        train=TrainConfig(
            steps=100_000, batch_size=64, evaluate_every=5000, checkpoint_every=2000,
            evaluation_batch_size=16,
        ),
    )  # fmt: skip
