"""Training over several nodes with Kubeflow Trainer: started, watched and removed by the step `train`."""
