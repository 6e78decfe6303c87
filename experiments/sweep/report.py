"""What is left of a sweep: a CSV with a row a trial, and three pictures."""

import csv
import pathlib
import warnings

import matplotlib
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as pictures

from experiments.sweep.search import ERROR, FOLDER, KEPT

matplotlib.use('agg')  # files, no windows
PICTURES = {
    'best_so_far': pictures.plot_optimization_history,
    'parallel_coordinates': pictures.plot_parallel_coordinate,
    'importance': pictures.plot_param_importances,
}


def write(study: optuna.Study, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes trials.csv and, from two complete trials of different accuracy on, the pictures.

    Returns:
        The files.
    """
    trials = study.get_trials(deepcopy=False)
    files = [folder / 'trials.csv']
    write_csv(trials, files[0])
    if len({trial.value for trial in trials if trial.state == TrialState.COMPLETE}) > 1:
        files += [_draw(study, name, folder) for name in PICTURES]
    return files


def states(trials: list[FrozenTrial]) -> list[str]:
    """Returns how each trial ended; 'abandoned' if another took over its folder, and with it its run."""
    last = {trial.user_attrs.get(FOLDER): trial.number for trial in trials}
    return [
        'abandoned'
        if FOLDER in trial.user_attrs and last[trial.user_attrs[FOLDER]] != trial.number
        else trial.state.name.lower()
        for trial in trials
    ]


def write_csv(trials: list[FrozenTrial], path: pathlib.Path) -> None:
    """Writes one row a trial: its number, folder, state, test accuracy, fields, and what its run said of itself."""
    fields = sorted({field for trial in trials for field in trial.params})
    columns = ['trial', FOLDER, 'state', 'test_accuracy', *fields, 'evaluations', *KEPT, 'start', 'end', ERROR]
    draft = path.with_suffix('.tmp')
    with draft.open('w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for trial, state in zip(trials, states(trials), strict=True):
            values = {
                'trial': trial.number,
                FOLDER: trial.user_attrs.get(FOLDER),
                'state': state,
                'test_accuracy': None if trial.state == TrialState.FAIL else trial.value,
                'evaluations': len(trial.intermediate_values),
                'start': _time(trial.datetime_start),
                'end': _time(trial.datetime_complete),
                ERROR: trial.user_attrs.get(ERROR),
            }
            writer.writerow(values | trial.params | {name: trial.user_attrs.get(name) for name in KEPT})
    draft.replace(path)


def _time(when: object) -> str | None:
    return when.isoformat(timespec='seconds') if when else None


def _draw(study: optuna.Study, name: str, folder: pathlib.Path) -> pathlib.Path:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)  # Optuna's own name for these plots
        axes = PICTURES[name](study)
    figure = axes.figure
    figure.set_size_inches(10, 5)
    path = folder / f'{name}.png'
    figure.savefig(path, dpi=120, bbox_inches='tight')
    matplotlib.pyplot.close(figure)
    return path
