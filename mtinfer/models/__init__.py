"""Model mathematics: tensors in, tensors out. Nothing here knows of files, ASE or the compiler."""

from .energy import EnergyModel, edge_gradients, forces_and_virial

__all__ = ["EnergyModel", "edge_gradients", "forces_and_virial"]
