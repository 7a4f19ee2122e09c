"""Block sizes and warps of the kernels. None is measured yet: they are chosen by counting bytes in flight."""

# elements per program and warps; 1024 float32 elements of four tensors are 16 KiB in flight per program
ADAM_BLOCK = 1024
ADAM_WARPS = 4

# the three constraints: chosen from the loops compiled for sm_90 (share of multiply-add slots, no spills), not measured

# tiles of channels and pixels by the input precision of the products (ieee runs without tensor cores)
POOL_FWD = {
    "tf32": {"BC": 128, "BP": 64, "num_warps": 4, "num_stages": 2},
    "ieee": {"BC": 64, "BP": 32, "num_warps": 8, "num_stages": 2},
}
POOL_BWD = {
    "tf32": {"BC": 64, "BP": 64, "num_warps": 8, "num_stages": 2},
    "ieee": {"BC": 32, "BP": 32, "num_warps": 8, "num_stages": 2},
}
POOL_SCALE = {"BLOCK": 4096, "num_warps": 8}
POOL_BWD_INNER = {"BLOCK": 8192, "num_warps": 8}
POOL_BWD_SUM = {"BLOCK": 1024, "num_warps": 4}
# four programs for each of 132 multiprocessors; channels are split until there are that many
POOL_PROGRAMS = 528

PROTOTYPE_DISTANCE = {"BN": 32, "BK": 32, "BD": 32, "STAGES": 3, "num_warps": 8}
PROTOTYPE_LOSS = {"BK": 256, "num_warps": 4}
PROTOTYPE_BWD = {"BN": 32, "BK": 4, "BD": 128, "STAGES": 3, "num_warps": 4}
PROTOTYPE_PROGRAMS = 528

SIMILARITY_FWD = {"BLOCK": 2048, "num_warps": 8}
SIMILARITY_BWD = {"BLOCK": 1024, "num_warps": 4}

# programs of a BN pass: sixteen for each of an H200's 132 multiprocessors
BN_PROGRAMS = 2112
# tile of the kernel that merges the parts of a segment
BN_MERGE_PARTS = 16
BN_MERGE_CHANNELS = 64
BN_MERGE_WARPS = 4


def bn_tile(channels: int, last: bool) -> tuple[int, int, int]:
    """Pixel rows and channels of a tile, and warps: 2048 elements, 16 for each thread."""
    if not last:
        return 1024, 1, 4
    bc = 8
    while bc < 64 and bc < channels:
        bc *= 2
    return 2048 // bc, bc, 4


# elements of a tile of max_pool, 8 for each thread: with 16 its nine loads would take 190 registers
MAX_POOL_ELEMENTS = 1024
MAX_POOL_WARPS = 4

# columns of one image row that a program of crop_flip_roll takes, and its warps
CROP_COLUMNS = 256
CROP_WARPS = 4
