"""Kernels of others to compare with, peers/<op>/<name>.py; see launch.kernels for what one has."""
