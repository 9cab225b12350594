"""The HTTP endpoint: app builder, ingress, classifier and the Serve config files.

This package shares its last name with Ray's: inside it, `from ray import serve as ray_serve`.
"""
