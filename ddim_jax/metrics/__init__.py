"""Distances between sets of images; import the modules.

frechet, kid, inception_score and precision_recall hold each metric twice: as a pure function on
arrays of features, and as a `Metric` (metric) that is fed batch by batch; table has them by name.
They know no network. inception and classifier are networks, features has them by name, and
statistics brings both together with what images are compared with.
"""
