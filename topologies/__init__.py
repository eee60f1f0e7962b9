"""Emulates: Mininet networks of UEs, gNBs, UPF, anchors and core, and their endpoint programs."""
