"""The numbers of DeepSeek-V3's fp8 formats (technical report, section 3.3.2)."""

FP8_MAX = 448.0  # the largest e4m3 value
BLOCK = 128
