"""Model mathematics: tensors in, tensors out. Nothing knows of files, ASE or (but `pieces`) the compiler."""

from .energy import EnergyModel, edge_gradients, forces_and_virial

__all__ = ["EnergyModel", "edge_gradients", "forces_and_virial"]
