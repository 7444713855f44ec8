"""Multitask training: one compiled step per architecture, and checkpoints that the field can read."""
