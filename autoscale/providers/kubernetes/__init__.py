"""Machines that are worker pods of a RayService's RayCluster, under KubeRay."""
