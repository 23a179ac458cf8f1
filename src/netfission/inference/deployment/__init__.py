"""Fast inference: batch norms folded, masks applied to weights, and the paths of a stage run together."""

from netfission.inference.deployment.deployed import Deployed, deploy, deploy_exits

__all__ = ["Deployed", "deploy", "deploy_exits"]
