# shellcheck shell=bash
# What a program that writes to a log is doing: on a terminal a line that is kept up to date, else a line now and then.

: "${PROGRESS_SECONDS:=15}"  # between lines where there is no terminal
PROGRESS=''

# Lines that say how far something is, and what is shown of them: training (Megatron's lines, then slime's), evalscope.
readonly PROGRESS_LINES='
s/^.* iteration +([0-9]+)\/ *([0-9]+) .* lm loss: ([0-9.]{5})[0-9]*E\+00 .*/iteration \1 of \2, loss \3/p
s/^step ([0-9]+): \{.*train\/loss.: ([^,}]+).*/step \1, loss \2/p
s/^rollout ([0-9]+): .*raw_reward_drawn.: ([^,}]+).*/rollout \1, reward \2/p
s/^.*Evaluating\[[^]]*\]: .*\| *([0-9]+)\/([0-9]+) \[.*/answer \1 of \2/p'

# clock SECONDS: 1:05.
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# latest LOG FROM WIDTH: what the log says after its first FROM bytes; of its last lines one that says how far it is, if
# there is one. slime counts from 0 and names its last rollout in the beginning.
latest() {
  local end line last
  end=$(tail -c "+$(($2 + 1))" "$1" | tail -c 3000 | tr '\r' '\n' | sed -E $'s/\e\\[[0-9;?]*[A-Za-z]//g' |
    tr -d '\000-\010\013-\037' | grep -a '[[:alnum:]]') || end='no word yet'
  line=$(sed -nE "$PROGRESS_LINES" <<<"$end" | tail -n 1)
  [[ -n $line ]] || line=$(tail -n 1 <<<"$end")
  if [[ $line =~ ^(step|rollout)\ ([0-9]+),(.*) ]]; then
    last=$(tail -c "+$(($2 + 1))" "$1" | sed -nE 's/^rollouts [0-9]+ to ([0-9]+), .*/\1/p' | tail -n 1)
    line="${BASH_REMATCH[1]} $((BASH_REMATCH[2] + 1))${last:+ of $((last + 1))},${BASH_REMATCH[3]}"
  fi
  printf '%s\n' "${line:0:$3}"
}

on_terminal() { [[ -t 1 && ${TERM:-dumb} != dumb ]]; }

# ppid_of PID: its parent; another one from the moment when that is dead, be it that no one has waited for it.
ppid_of() { sed -nE 's/^PPid:\s*//p' "/proc/$1/status"; }

# show_progress LOG FROM: as long as its parent, PARENT, is alive. Holds no lock of it.
show_progress() {
  local start=$SECONDS said=$SECONDS width=100 columns me=$BASHPID screen
  [[ -z ${LOCK_FD-} ]] || exec {LOCK_FD}>&-
  exec {screen}>&1
  while sleep 1 >/dev/null 2>&1 && [[ $(ppid_of "$me") == "$PARENT" ]]; do
    if on_terminal; then
      columns=$(stty size <&"$screen" 2>/dev/null | cut -d ' ' -f 2) || columns=0
      ((columns < 20)) || width=$((columns - 12))
      printf '\r\e[K  %s  %s' "$(clock $((SECONDS - start)))" "$(latest "$1" "$2" "$width")"
    elif ((SECONDS - said >= PROGRESS_SECONDS)); then
      said=$SECONDS
      printf '  %s  %s\n' "$(clock $((SECONDS - start)))" "$(latest "$1" "$2" "$width")"
    fi
  done
}

# start_progress LOG FROM, stop_progress: and take its line away.
start_progress() {
  local PARENT=$BASHPID
  show_progress "$1" "$2" &
  PROGRESS=$!
}
stop_progress() {
  [[ -n $PROGRESS ]] || return 0
  kill "$PROGRESS" 2>/dev/null || true
  wait "$PROGRESS" 2>/dev/null || true
  PROGRESS=''
  ! on_terminal || printf '\r\e[K'
}
