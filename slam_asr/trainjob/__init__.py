"""Training on several nodes with Kubeflow Trainer.

The step `train` creates, follows and deletes a TrainJob.
"""
