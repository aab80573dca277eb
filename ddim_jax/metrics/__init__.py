"""Distances between sets of images, as pure functions on feature arrays; import the modules.

frechet, kid, inception_score and precision_recall take arrays of features and know no network;
inception and classifier are the networks; statistics binds the two and is what scripts use.
"""
