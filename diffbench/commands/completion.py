"""`diffbench completion`: print a shell script that completes commands, keys and files without starting Python."""

import argparse

from diffbench.commands.verbs import VERBS

SCRIPT = """\
# Add to ~/.bashrc: source <(diffbench completion)
_diffbench() {
    local IFS=$' \\t\\n' word=${COMP_LINE:0:COMP_POINT} words
    word=${word##*[[:space:]]}
    if [ "$COMP_CWORD" -le 1 ]; then
        COMPREPLY=($(compgen -W "VERBS" -- "$word"))
        return
    fi
    case ${COMP_WORDS[1]} in
CASES
    esac
    case $word in
        *=*) COMPREPLY=($(compgen -f -- "${word#*=}")) ;;
        *) COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word")) ;;
    esac
    [ "${#COMPREPLY[@]}" -eq 1 ] && [ -d "${COMPREPLY[0]}" ] && COMPREPLY=("${COMPREPLY[0]}/")
    [[ ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace
}
complete -F _diffbench diffbench"""


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    cases = []
    for name, verb in VERBS.items():
        keys = [f"{key.name}=" for key in verb.read_keys()]
        cases.append(f"        {name}) words='{' '.join([*keys, *['--json'] * verb.json, '--help'])}' ;;")
    print(SCRIPT.replace("VERBS", " ".join(VERBS)).replace("CASES", "\n".join(cases)))
