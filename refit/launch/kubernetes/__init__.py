"""Ranks in the pods of a Kubernetes cluster.

`values` says what a site gives, `manifests` and `kinds` render it, `validation` holds a manifest against the types of
the API, `api` and `follow` speak to a server, `pod` is what runs in each pod.
"""
