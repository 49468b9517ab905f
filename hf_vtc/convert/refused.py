"""Bases of transformers that no method here fits yet, and why: named, so that nobody has to guess."""

# by `model_type`
REFUSED_BASES = {
    "fast_vlm": "its tower gives few tokens already, and none before the last stage",
    "gemma3": "its decoder attends in both directions inside of an image and by windows of the full sequence",
    "gemma4": "its decoder has inputs of its own at every layer and windows of the full sequence",
    "idefics3": "an image is many runs of placeholders with text between them",
    "llava_next_video": "videos are not supported",
    "qwen2_vl": "its tower is not among those whose grids were tried; Qwen2.5-VL's is",
    "qwen3_5_moe": "decoders with experts were not tried on grids",
    "qwen3_vl_moe": "decoders with experts were not tried on grids",
    "smolvlm": "an image is many runs of placeholders with text between them",
    "video_llava": "videos are not supported",
}
