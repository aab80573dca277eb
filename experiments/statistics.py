"""Statistics of a data set's features: what samples are measured against.

python experiments/statistics.py cifar10 --features inception --out stats/cifar10.npz
python experiments/statistics.py digits --features classifier --out classifier/stats.npz

The script itself is make_statistics.py, because this file's name is also a standard module's.
"""

import importlib.machinery
import importlib.util
import sys
import sysconfig

if __name__ == "statistics":
    # A script's folder comes first on the path, so `import statistics` anywhere in its process
    # finds this file. Hand over the standard library's module, as if this one were not here.
    spec = importlib.machinery.PathFinder.find_spec(__name__, [sysconfig.get_path("stdlib")])
    assert spec is not None and spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

if __name__ == "__main__":
    import cli
    import make_statistics

    cli.run(make_statistics.main, make_statistics.StatisticsConfig)
