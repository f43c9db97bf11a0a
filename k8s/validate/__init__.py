"""Checks of the manifests in k8s/, without a cluster: `make k8s-validate`. Knows Kubernetes, and how we use it."""
