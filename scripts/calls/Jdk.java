import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Java's own client, which offers to go on in HTTP/2 with every request. */
class Jdk {
    public static void main(String[] args) throws Exception {
        var client = HttpClient.newHttpClient();
        var body = "{\"prompt\": \"Once upon a time\", \"max_tokens\": 8, \"seed\": 1}";
        for (int number = 0; number < 3; number++) { // over one connection
            var request = HttpRequest.newBuilder(
                    URI.create(System.getenv("ADDRESS") + "/v1/completions"))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body)).build();
            var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            if (answer.statusCode() != 200 || !answer.body().contains("\"finish_reason\""))
                throw new RuntimeException(answer.statusCode() + " " + answer.body());
        }
        System.out.println("JDK HttpClient " + System.getProperty("java.version"));
    }
}
