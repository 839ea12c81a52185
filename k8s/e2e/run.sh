#!/usr/bin/env bash
# Takes a release through its life on the cluster that kubectl is connected to: install, test, scale, add
# a model, replace the cluster twice, lose a gateway and the head, uninstall. After each step the release must
# answer. Needs kubectl and Helm (3 or 4; HELM names it), and a cluster that can pull or has IMAGE.
#
#   kind create cluster && kind load docker-image tera:cpu
#   IMAGE=tera:cpu k8s/e2e/run.sh
set -euo pipefail

: "${IMAGE:?give the image without CUDA, as repository:tag}"
: "${HELM:=helm}" "${NAMESPACE:=tera-e2e}" "${RELEASE:=e2e}" "${KUBERAY:=1.7.0}"

HERE=$(cd "$(dirname "$0")" && pwd)
CHART=$(cd "$HERE/../../helm/tera" && pwd)
VALUES=(-f "$HERE/values.yaml" --set "image.repository=${IMAGE%:*},image.tag=${IMAGE##*:}")

say() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }
k() { kubectl --namespace "$NAMESPACE" "$@"; }
field() { k get rayservice "$RELEASE" -o "jsonpath={.status.$1.rayClusterName}"; }

# until_true SECONDS COMMAND…
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || { echo "not in time: $*" >&2; return 1; }
    sleep 2
  done
}

answers() { "$HELM" test "$RELEASE" --namespace "$NAMESPACE" --timeout 10m --logs; }
upgrade() { "$HELM" upgrade "$RELEASE" "$CHART" --namespace "$NAMESPACE" "${VALUES[@]}" "$@"; }
gateway_ready() {
  k wait pod -l app.kubernetes.io/component=gateway --for condition=ready --timeout 1s > /dev/null 2>&1
}
taken_over() { [[ $(field activeServiceStatus) != "$1" && -z $(field pendingServiceStatus) ]]; }
gone() { [[ -z $(k get raycluster "$1" --ignore-not-found -o name) ]]; }
lost() { [[ -z $(k get "$1" --ignore-not-found -o name) ]]; }

failed() {
  say "failed"
  k get rayservice,raycluster,pods,events || true
  k describe pods || true
}
trap failed ERR

say "the operator"
"$HELM" upgrade --install kuberay-operator kuberay-operator --version "$KUBERAY" --wait \
  --repo https://ray-project.github.io/kuberay-helm/ --namespace kuberay-system --create-namespace

say "install"
"$HELM" install "$RELEASE" "$CHART" --namespace "$NAMESPACE" --create-namespace "${VALUES[@]}"
until_true 1200 gateway_ready
answers

say "an edit in place restarts nothing"
before=$(k get pods -l app.kubernetes.io/component=gateway -o name)
upgrade --set models.simulated.replicas.max=3
answers
[[ $(k get pods -l app.kubernetes.io/component=gateway -o name) == "$before" ]]

say "a second model"
upgrade --set models.second.id=tera/second --set models.second.engine.kind=simulated
answers

for number in 1 2; do
  say "takeover $number"
  active=$(field activeServiceStatus)
  upgrade --set-string "gateway.pod.annotations.e2e=$number"
  until_true 1200 taken_over "$active"
  answers
  until_true 600 gone "$active"
done

say "a gateway is lost"
pod=$(k get pods -l app.kubernetes.io/component=gateway -o name | head -n 1)
k delete "$pod" --wait=false
until_true 600 lost "$pod"
until_true 600 gateway_ready
answers

say "the head is lost"
workers=$(k get pods -l app.kubernetes.io/component=gateway -o name)
k delete pod -l app.kubernetes.io/component=head --wait=false
answers
k wait pod -l app.kubernetes.io/component=head --for condition=ready --timeout 10m
answers
[[ $(k get pods -l app.kubernetes.io/component=gateway -o name) == "$workers" ]]

say "uninstall"
"$HELM" uninstall "$RELEASE" --namespace "$NAMESPACE"
until_true 600 lost rayservice
k delete pod "$RELEASE-test" --ignore-not-found
until_true 600 lost pods
[[ $(k get secrets -o name) == "secret/$RELEASE-keys" ]]
kubectl delete namespace "$NAMESPACE" --wait=false
say "done"
