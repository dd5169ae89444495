"""Judging clips from pixels and samples alone: explainable detectors, calibrated on the world's own renders."""
