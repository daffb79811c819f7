"""Qualcomm's NPU (HTP): rules for its files, and its compiler with the emulator on x86-64 Linux."""
