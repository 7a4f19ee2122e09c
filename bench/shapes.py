"""Sizes at which operations are measured: the paper's step (B 100, 224x224, K 200) on its teachers, and tiny ones."""

# channels of the last feature map
CHANNELS = {"ResNet18": 512, "ResNet50": 2048, "DenseNet121": 1024, "MobileNetV2": 1280}

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
}

# for tests of the benches themselves, in the interpreter
TINY = {
    "bilinear_attention_pool": [{"n": 2, "c": 5, "m": 3, "size": 2}],
    "prototype_loss": [{"n": 3, "k": 4, "d": 20}],
    "attention_similarity_loss": [{"n": 3, "m": 2, "size": 3, "priors": 2}],
}
