import org.openapitools.client.ApiClient;
import org.openapitools.client.api.OpenaiApi;
import org.openapitools.client.model.CompletionRequest;
import org.openapitools.client.model.Prompt;

class Generated {
    public static void main(String[] args) throws Exception {
        var client = new ApiClient().setBasePath(System.getenv("ADDRESS"));
        var body = new CompletionRequest().prompt(new Prompt("Once")).maxTokens(4);
        var answer = new OpenaiApi(client).createCompletion(body);
        var reason = answer.getChoices().get(0).getFinishReason();
        if (!reason.toString().equals("length")) throw new RuntimeException(answer.toString());
    }
}
