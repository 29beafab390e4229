"""Trains on several nodes with Kubeflow Trainer: the step `train` creates, follows and deletes a TrainJob."""
