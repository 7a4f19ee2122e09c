"""Sizes at which operations are measured: the paper's step (B 100, 224x224, K 200) on its teachers, and tiny ones."""

# channels of the last feature map
CHANNELS = {"ResNet18": 512, "ResNet50": 2048, "DenseNet121": 1024, "MobileNetV2": 1280}

# (channels, side) of BN inputs: ResNet-18 and -50, DenseNet-121, MobileNetV2
LAYERS = [
    *((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)),
    *((256, 56), (512, 28), (1024, 14), (2048, 7)),
    *((96, 56), (992, 14), (1024, 7)),
    *((32, 112), (24, 56), (144, 56), (960, 7)),
]

PAPER = {
    "bilinear_attention_pool": [
        *({"n": 100, "c": c, "m": m, "size": 7} for c in CHANNELS.values() for m in (8, 32)),
        {"n": 100, "c": 2048, "m": 32, "size": 28},
        {"n": 1600, "c": 512, "m": 8, "size": 7},
    ],
    "prototype_loss": [
        *({"n": 100, "k": 200, "d": d} for d in (4096, 16384, 65536)),
        {"n": 1600, "k": 200, "d": 4096},
        {"n": 100, "k": 21841, "d": 4096},
    ],
    "attention_similarity_loss": [
        *({"n": 100, "m": m, "size": 7, "priors": 3} for m in (8, 32, 64)),
        {"n": 100, "m": 32, "size": 28, "priors": 3},
    ],
    "bn_matching": [{"n": 100, "c": c, "size": size, "segments": 1} for c, size in LAYERS],
    "bn_act_matching": [
        *({"n": 100, "c": c, "size": size, "segments": 1, "residual": r} for c, size in LAYERS for r in (0, 1)),
        {"n": 1600, "c": 64, "size": 56, "segments": 16, "residual": 0},
        {"n": 100, "c": 256, "size": 14, "segments": 10, "residual": 1},
    ],
    "crop_flip_roll": [
        {"n": 100, "size": 224, "out": 224, "segments": 1},
        {"n": 1600, "size": 224, "out": 224, "segments": 16},
        {"n": 100, "size": 224, "out": 224, "segments": 100},
        {"n": 100, "size": 200, "out": 224, "segments": 1},
        {"n": 100, "size": 224, "out": 200, "segments": 1},
    ],
    "adam_clamp_": [{"n": n, "size": 224, "moments": m} for n in (100, 1600) for m in ("float32", "bfloat16")],
    "max_pool": [{"n": n, "c": 64, "size": 112, "kernel": 3, "stride": 2} for n in (100, 1600)],
}

# for tests of the benches themselves, in the interpreter
TINY = {
    "bilinear_attention_pool": [{"n": 2, "c": 5, "m": 3, "size": 2}],
    "prototype_loss": [{"n": 3, "k": 4, "d": 20}],
    "attention_similarity_loss": [{"n": 3, "m": 2, "size": 3, "priors": 2}],
    "bn_matching": [{"n": 3, "c": 8, "size": 3, "segments": 2}],
    "bn_act_matching": [{"n": 3, "c": 8, "size": 3, "segments": 2, "residual": r} for r in (0, 1)],
    "crop_flip_roll": [{"n": 2, "size": 3, "out": 4, "segments": 2}],
    "adam_clamp_": [{"n": 2, "size": 3, "moments": m} for m in ("float32", "bfloat16")],
    "max_pool": [{"n": 2, "c": 3, "size": 5, "kernel": 3, "stride": 2}],
}
