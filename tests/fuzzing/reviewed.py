"""Wrong-looking values that are right, each with its reason."""

# What is taken, and why that is right: (callable, argument, kind of value), with "*" for any.
REVIEWED = {
    ("*", "*", "huge"): "a large setting; time and memory are what counts",
    ("*", "*", "huge inside"): "a large setting; time and memory are what counts",
    ("*", "gate_bias", "0"): "any number is a bias",
    ("dot_product_attention", "mask", "integers"): "1 stands for True",
    ("dot_product_attention", "mask", "floats"): "1.0 stands for True, as in Flax",
    ("dot_product_attention", "scale", "0"): "any number is a factor",
    ("dot_product_attention", "scale", "-1"): "any number is a factor",
    **{
        ("dot_product_attention", name, "rank - 1"): "one row for all sequences"
        for name in (
            *("query_positions", "key_positions"),
            *("query_segment_ids", "key_segment_ids"),
        )
    },
    **{
        ("Transformer.__call__", name, "rank - 1"): "one row for all sequences"
        for name in ("positions", "segment_ids")
    },
    **{
        (f"{scaling}.__call__", "length", "nans"): "not read"
        for scaling in ("Linear", "NTKAware", "YaRN")
    },
    **{
        (f"{task}.example", "index", "0"): "the first example"
        for task in ("FlipFlop", "SelectiveCopy", "Text")
    },
    **{(call, "path", "empty"): "the standard library" for call in ("load_corpus", "Text")},
    **{(call, "suffixes", "empty"): "all files" for call in ("load_corpus", "Text")},
    ("index_hints", "numbers", "empty"): "no numbers",
    ("keep_within", "high", "inf"): "no limit",
    ("Vocabulary.decode", "ids", "empty"): "no tokens",
    ("Vocabulary.decode", "ids", "0 inside"): "a token id",
    ("ContextualBias", "gate_scale", "0"): "all gates are alike",
    ("ContextualBias", "gate_scale", "-1"): "any number is a factor",
    ("ClippedTableBias", "key", "nans"): "not read without key_table",
    ("MultiplierBias", "key", "nans"): "not read without by_channel",
    ("rotate", "length", "nans"): "not read without a scaling",
    ("rope_turn", "length", "nans"): "not read without a scaling",
    ("t5_buckets", "relative", "nans"): "-1, which is no bucket",
    **{
        ("languages", name, kind): reason
        for name in ("second", "neutral")
        for kind, reason in (
            ("empty", "no such token"),
            ("0 inside", "a token id"),
            ("-1 inside", "no token has it"),
        )
    },
    ("Abacus", "digits", "0 inside"): "a token id",
    ("BiPE", "separators", "0 inside"): "a token id",
    ("CONFLATOR", "neutral", "0 inside"): "a token id",
    ("CONFLATOR", "neutral", "empty"): "no neutral token",
    ("CONFLATOR", "second", "empty"): "no second language",
    ("is_one_of", "ids", "0 inside"): "a token id",
    ("is_one_of", "ids", "-1 inside"): "no token has it",
    ("is_one_of", "ids", "empty"): "no token is one of none",
    ("MsPoE", "order", "empty"): "no heads",
    ("MsPoE", "order", "0 inside"): "the order of one head",
    ("ms_poe_ratios", "order", "0 inside"): "the order of one head",
}
# Settings that may be below 0, or 0, and why.
ANY = {
    "gate_bias": "any number is a bias",
    "seed": "KernelizedAttention: jax.random.key takes any integer",
    "evaluation_seed": "Randomized: jax.random.key takes any integer",
}
MAY_BE_NEGATIVE = ANY | {"data": "-1 takes all devices"}
MAY_BE_0 = ANY | {
    "max_offset": "no offset",
    "initial_deviation": "starts at 0",
    "table_deviation": "starts at 0",
    "left_bonus": "no bonus",
    "minimum": "no minimum",
    "fraction": "PRoPE: no pair is turned",
    "draw": "the first draw",
    "skip_layers": "no layer",
    "block": "no block",
    "max_shift": "no shift",
    "dropout": "no dropout",
    "local_window": "the token itself",
    "p_ignore": "never",
    "sparse_p_ignore": "never",
    "dense_p_ignore": "never",
    "blanks": "none",
    "dense_blanks": "none",
    "sparse_blanks": "none",
    "warmup_steps": "none",
    "final_fraction": "falls to 0",
    "weight_decay": "none",
    "b1": "no momentum",
    "b2": "no average",
    "clip_norm": "no clipping",
    "encoding_learning_rate_multiplier": "frozen",
    "evaluate_every": "only at the end",
}

# The same for arguments of functions and fields of descriptions.
_ZERO = MAY_BE_0 | {
    "dropout_rate": "no dropout",
    "local_window_size": "the token itself",
    "probability": "no spaces",
    "batch": "an empty batch",
    "length": "no tokens",
    "channels": "no channels",
    "offset": "starts at 0",
    "window": "no neighbours",
    "low": "any number is a limit",
    "high": "any number is a limit",
    "number": "zero is a number",
    "first": "zero is a number",
    "second": "zero is a number",
    "table": "an empty table",
    "temperature": "the most probable token",
    "process_index": "the first process",
    "factor": "any number is a factor",
    "query_factor": "any number is a factor",
    "bias_scale": "any number is a factor",
}
_NEGATIVE = MAY_BE_NEGATIVE | {
    "offset": "a sequence that begins earlier",
    "low": "any number is a limit",
    "high": "any number is a limit",
    "factor": "any number is a factor",
    "query_factor": "any number is a factor",
    "bias_scale": "any number is a factor",
}
REVIEWED |= {("*", name, "0"): reason for name, reason in _ZERO.items()}
REVIEWED |= {("*", name, "-1"): reason for name, reason in _NEGATIVE.items()}
