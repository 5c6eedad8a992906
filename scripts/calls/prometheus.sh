curl -sf "$ADDRESS/metrics" | promtool check metrics || test $? = 3  # 3: a matter of taste
cat > prometheus.yml <<END
global: {scrape_interval: 1s}
scrape_configs: [{job_name: gpt2, static_configs: [{targets: ["${ADDRESS#http://}"]}]}]
END
port=${PROMETHEUS_PORT:-19090}
prometheus --config.file=prometheus.yml --storage.tsdb.path=. \
  --web.listen-address=127.0.0.1:$port > log 2>&1 &
trap "kill $!" EXIT
for second in $(seq 30); do
  sleep 1
  answer=$(curl -sg "http://127.0.0.1:$port/api/v1/query?query=up{job=\"gpt2\"}" || true)
  [[ $answer = *'"1"]'* ]] && break
done
curl -sf "http://127.0.0.1:$port/api/v1/query?query=vllm:num_requests_running" | grep -q gpt2
[[ $answer = *'"1"]'* ]]
prometheus --version 2>&1 | head -1
