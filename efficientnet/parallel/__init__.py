"""Replicas, stages and hosts: where the model lies, and the weight update as one program over all devices."""
