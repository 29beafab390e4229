"""The Kubeflow component `notify`, which runs in the image of `build-manifest`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("notify"), install_kfp_package=False)
def notify(store: str, form: str, api: str, dashboard: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Send a message to a webhook after the end of the run, whether or not it was successful.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        form: Format of the message, slack or cloudevents.
        api: Address of the API of Kubeflow Pipelines inside the cluster.
        dashboard: Address of the dashboard, to which the message links; empty for none.
        status: State of the steps; Kubeflow fills it in.
    """
    try:
        from slam_asr.stages.notify import notify as run

        run(store, form, api, dashboard, status.state or "")
    # A message must never change the state of the run. Only the error's type is printed, because its text
    # could contain the webhook's URL, which is a secret.
    except Exception as error:
        print(f"warning: no notice was sent ({type(error).__name__})")
