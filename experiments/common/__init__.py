"""What several scripts share: the command line, options, figures, real images, a sweep's files."""
