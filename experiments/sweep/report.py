"""What is left of a sweep: a CSV with a row a trial, and three pictures."""

import csv
import pathlib
import warnings

import matplotlib
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as pictures

from experiments.sweep.search import ERROR, FOLDER, KEPT

matplotlib.use('agg')  # files, no windows
OBJECTIVE = 'test accuracy'
PICTURES = {
    'best_so_far': (pictures.plot_optimization_history, 'the best so far'),
    'parallel_coordinates': (pictures.plot_parallel_coordinate, 'a line a trial'),
    'importance': (pictures.plot_param_importances, 'how much each field matters'),
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
        plot, title = PICTURES[name]
        axes = plot(study, target_name=OBJECTIVE)
    figure, count = axes.figure, len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    figure.set_size_inches(10, 5)
    for place, text in {'center': '', 'left': f'{study.study_name}, {count} trials: {title}'}.items():
        axes.set_title(text, loc=place)
    if name == 'best_so_far':
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a trial
    if name == 'parallel_coordinates':
        # Optuna cuts long names off at their end, where they differ; its order is that of the names.
        fields = sorted({field for trial in study.get_trials(deepcopy=False) for field in trial.params})
        labels = [OBJECTIVE, *(field.rpartition('.')[2] for field in fields)]
        axes.set_xticks(range(len(labels)), labels, rotation=20, ha='right')
        axes.collections[0].set_cmap('viridis_r')  # Optuna's lightest blue is that of its grid
        for each in figure.axes:
            each.grid(False)
    if name == 'importance':
        axes.set(xlabel='share of what sets good trials apart (PED-ANOVA)', ylabel='')
        axes.get_legend().remove()
    path = folder / f'{name}.png'
    figure.savefig(path, dpi=120, bbox_inches='tight')
    matplotlib.pyplot.close(figure)
    return path
